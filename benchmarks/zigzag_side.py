"""ZigZag's side of the crosscheck: a board, a loop nest and a loop order as ZigZag reads them, and what it answers."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Any

import yaml

from e2pass.backends.fpga.board import Board
from e2pass.backends.fpga.nest import Nest


@dataclass
class Result:
    """What one tool says about one phase of one convolution; the energy is that of the memories."""

    macs: float = 0.0
    off_chip_bytes: float = 0.0
    memory_pj: float = 0.0
    seconds: float = 0.0

    def plus(self, other: Result) -> Result:
        return Result(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


def accelerator(board: Board, mac_pj: float) -> dict[str, Any]:
    """The board as ZigZag describes one: an accumulator in every element, then the memories of the board."""
    rows, columns = int(board.array.rows_pe.value), int(board.array.columns_pe.value)
    width = int(board.array.accumulator_bits.value)
    both = {"bandwidth_min": width, "bandwidth_max": width}
    memories: dict[str, Any] = {
        "accumulator": {
            "size": width, "r_cost": 0.0, "w_cost": 0.0, "area": 0.0, "latency": 1, "operands": ["O"],
            "ports": [
                {"name": "r_port_1", "type": "read", **both, "allocation": ["O, tl", "O, th"]},
                {"name": "w_port_1", "type": "write", **both, "allocation": ["O, fh", "O, fl"]},
            ],
            "served_dimensions": [],
        }
    }  # fmt: skip
    for level in board.memory:
        # Narrow accesses take their share of the energy of a full one, so that the price is that of bits.
        bits = int(level.width_bits.value)
        cost = bits * level.energy_pj_per_bit.value
        memories[level.name] = {
            "size": int(level.size_bytes.value * 8), "r_cost": cost, "w_cost": cost, "area": 0.0, "latency": 1,
            "operands": ["I1", "I2", "O"], "force_double_buffering": level is not board.off_chip,
            "ports": [{
                "name": "rw_port_1", "type": "read_write", "bandwidth_min": 8, "bandwidth_max": bits,
                "allocation": [f"{o}, {d}" for o, ds in (("I1", "fh tl"), ("I2", "fh tl"), ("O", "fh tl fl th"))
                               for d in ds.split()],
            }],
            "served_dimensions": ["D1", "D2"],
        }  # fmt: skip
    array = {"unit_energy": mac_pj, "unit_area": 0.0, "dimensions": ["D1", "D2"], "sizes": [rows, columns]}
    return {"name": board.name, "memories": memories, "operational_array": array}


def layer(nest: Nest) -> dict[str, Any]:
    """A nest as ZigZag describes a layer; its operand W is the second tensor that is read."""
    rows, columns = nest.windows
    dims = {"x": "[b][c][iy][ix]", "w": "[k][c][fy][fx]", "y": "[b][k][oy][ox]"}
    first, second = nest.reads
    sizes = {"B": nest.b, "K": nest.k, "C": nest.c, "OY": rows.out, "OX": columns.out, "FY": rows.kernel}
    sizes |= {"FX": columns.kernel}
    return {
        "id": 0, "name": "nest", "operator_type": "Conv",
        "equation": f"O{dims[nest.writes]}+=I{dims[first]}*W{dims[second]}",
        "dimension_relations": [f"ix={columns.stride}*ox+1*fx", f"iy={rows.stride}*oy+1*fy"],
        "loop_dims": list(sizes), "loop_sizes": list(sizes.values()),
        "pr_loop_dims": ["IX", "IY"], "pr_loop_sizes": [columns.size, rows.size],
        "padding": [[columns.padding] * 2, [rows.padding] * 2],
        "operand_precision": {
            "I": nest.bits(first), "W": nest.bits(second), "O": 32, "O_final": nest.bits(nest.writes),
        },
        "operand_source": {},
    }  # fmt: skip


def unrolling(nest: Nest, board: Board) -> dict[str, list[str]]:
    """Our spread over the array, in whole loops: output channels on one axis, positions or taps on the other."""
    sizes = {"B": nest.b, "K": nest.k, "C": nest.c, "FX": nest.windows[1].kernel}
    first = ["B"] if nest.writes == "y" else ["C", "FX"]
    axes = {"D1": int(board.array.rows_pe.value), "D2": int(board.array.columns_pe.value)}
    options = []
    for one, other in (("D1", "D2"), ("D2", "D1")):
        chosen = {one: _fill(["K"], sizes, axes[one]), other: _fill(first, sizes, axes[other])}
        used = math.prod(size for loops in chosen.values() for _, size in loops)
        options.append((used, chosen))
    _, best = max(options, key=lambda option: option[0])
    return {axis: [f"{loop}, {size}" for loop, size in best[axis]] for axis in ("D1", "D2")}


def _fill(loops: list[str], sizes: dict[str, int], axis: int) -> list[tuple[str, int]]:
    """Factors of loops whose product fills an axis best."""
    factors = [[f for f in range(1, sizes[loop] + 1) if sizes[loop] % f == 0] for loop in loops]
    best = max((c for c in product(*factors) if math.prod(c) <= axis), key=math.prod)
    return list(zip(loops, best, strict=True))


def orderings(nest: Nest, tile: Nest, board: Board) -> Iterator[list[list[Any]]]:
    """Loop orders of our tiling, from the inside out: sums, the rest of the tile, what steps over it.

    K and C are rounded both ways where a tile is no multiple of what the array works on. Outside of the tile stand the
    loops that are irrelevant for one tensor, then those for another, then the rest.
    """
    sizes = {"B": nest.b, "K": nest.k, "C": nest.c, "OY": nest.windows[0].out, "OX": nest.windows[1].out}
    sizes |= {"FY": nest.windows[0].kernel, "FX": nest.windows[1].kernel}
    wanted = {**sizes, "K": tile.k, "C": tile.c, "OY": tile.windows[0].out, "OX": tile.windows[1].out}
    wanted["B"] = nest.b if nest.writes == "y" else tile.b
    for loops in unrolling(nest, board).values():
        for text in loops:
            loop, size = text.split(", ")
            sizes[loop], wanted[loop] = sizes[loop] // int(size), max(1, wanted[loop] // int(size))
    irrelevant = {"x": ["K"], "w": ["B", "OX", "OY"], "y": ["FX", "FY", "C"]}
    sums = irrelevant[nest.writes]
    tiled = [*sums, *(n for n in ("FX", "FY", "OX", "OY", "B", "C", "K") if n not in sums)]
    down = {n: max([f for f in range(1, wanted[n] + 1) if sizes[n] % f == 0]) for n in sizes}
    up = {n: min([f for f in range(wanted[n], sizes[n] + 1) if sizes[n] % f == 0], default=sizes[n]) for n in sizes}
    for k, c in product({down["K"], up["K"]}, {down["C"], up["C"]}):
        inside = {**down, "K": k, "C": c}
        for sequence in permutations(irrelevant):
            outside = [loop for name in sequence for loop in irrelevant[name]]
            order: list[list[Any]] = [[n, inside[n]] for n in tiled]
            order += [[n, sizes[n] // inside[n]] for n in outside]
            yield [entry for entry in order if entry[1] > 1]


def zigzag(board: Board, nest: Nest, effort: int, ordering: list[list[Any]] | None = None) -> Result:
    """Run ZigZag's search, or its cost model on one loop order, without the stages that draw and save."""
    from zigzag.mapping.temporal_mapping import TemporalMappingType
    from zigzag.stages.evaluation.cost_model_evaluation import CostModelStage
    from zigzag.stages.main import MainStage
    from zigzag.stages.mapping.spatial_mapping_generation import SpatialMappingGeneratorStage
    from zigzag.stages.mapping.temporal_mapping_generator_stage import TemporalMappingGeneratorStage
    from zigzag.stages.parser.accelerator_parser import AcceleratorParserStage
    from zigzag.stages.parser.workload_parser import WorkloadParserStage
    from zigzag.stages.results.reduce_stages import MinimalEnergyStage
    from zigzag.stages.workload_iterator import WorkloadStage

    stages: list[Any] = [
        WorkloadParserStage, AcceleratorParserStage, WorkloadStage, MinimalEnergyStage, SpatialMappingGeneratorStage,
        MinimalEnergyStage, TemporalMappingGeneratorStage, CostModelStage,
    ]  # fmt: skip
    links = {"O": "O", "W": "I2", "I": "I1"}
    mapping: list[dict[str, Any]] = [
        {"name": "default", "spatial_mapping": unrolling(nest, board), "memory_operand_links": links}
    ]
    if ordering is not None:
        mapping[0]["temporal_ordering"] = ordering
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for name, content in (
            ("accelerator", accelerator(board, 1.0)),
            ("mapping", mapping),
            ("workload", [layer(nest)]),
        ):
            paths[name] = f"{folder}/{name}.yaml"
            Path(paths[name]).write_text(yaml.safe_dump(content), encoding="utf-8")
        started = time.process_time()
        answers = MainStage(
            stages, **paths, loma_lpf_limit=effort, loma_show_progress_bar=False, nb_mappings_generated=1,
            enable_mix_spatial_mapping_generation=False, access_same_data_considered_as_no_access=False,
            temporal_mapping_type=TemporalMappingType("uneven"),
        ).run()  # fmt: skip
        seconds = time.process_time() - started
    cme = answers[0][0]
    off_chip = 0.0
    per_bit = board.off_chip.energy_pj_per_bit.value
    for parts in cme.mem_energy_breakdown.values():
        off_chip += parts[-1] / per_bit / 8
    return Result(float(cme.layer.total_mac_count), off_chip, float(cme.mem_energy), seconds)
