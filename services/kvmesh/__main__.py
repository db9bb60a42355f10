"""`python -m kvmesh` is `kvmesh`."""

import sys

from kvmesh.cli import main

sys.exit(main())
