"""Replays of traces: what a cluster would do, from the code that serves.

The simulation is in Rust (`router_rs/simulator`). Here is what people ask it
with: profiles of hardware, tables, a report.
"""

from kvmesh.simulate.profiles import Profile, ProfileError, load_profile, profile_names
from kvmesh.simulate.replay import Cluster, Policy, Run, TraceFile, replay

__all__ = [
    "Cluster",
    "Policy",
    "Profile",
    "ProfileError",
    "Run",
    "TraceFile",
    "load_profile",
    "profile_names",
    "replay",
]
