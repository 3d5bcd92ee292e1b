"""The passes: each reads and writes one program."""

if __name__ != "e2pass.passes":  # the folder was imported as top-level `passes`: two copies of every class
    raise ImportError("import e2pass.passes, not passes")
