"""Generated wire code of package kvmesh.v1 (make wire)."""
