"""Launch check, errors and exit codes, log, progress, topology, provenance: leaves that anything may use."""
