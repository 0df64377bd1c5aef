"""The mesh and everything that depends on it: roles, specs, collectives, loading into shards."""
