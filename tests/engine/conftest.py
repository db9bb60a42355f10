import sys
from pathlib import Path

# The harness beside these tests; tests here are no package.
sys.path.insert(0, str(Path(__file__).parent))
