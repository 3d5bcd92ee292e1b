"""The backends: what consumes a program."""

if __name__ != "e2pass.backends":  # the folder was imported as top-level `backends`: two copies of every class
    raise ImportError("import e2pass.backends, not backends")
