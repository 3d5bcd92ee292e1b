"""The static FPGA cost analyzer: board descriptions, formulas for operators, and the cost model."""

from e2pass.backends.fpga import formulas as _formulas  # registers the formulas that ship
from e2pass.backends.fpga.board import Board, Quantity, list_boards, load_board, parse_board
from e2pass.backends.fpga.model import FpgaCostModel
from e2pass.backends.fpga.registry import WorkFormula, declare_free, lookup, register_cost, registered, unregister
from e2pass.backends.fpga.workload import Alu, Product, Reread, Work

del _formulas

__all__ = [
    "Alu",
    "Board",
    "FpgaCostModel",
    "Product",
    "Quantity",
    "Reread",
    "Work",
    "WorkFormula",
    "declare_free",
    "list_boards",
    "load_board",
    "lookup",
    "parse_board",
    "register_cost",
    "registered",
    "unregister",
]
