"""Board descriptions that ship with e2pass, one YAML file each."""
