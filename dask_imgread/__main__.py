"""Run the command line as ``python -m dask_imgread``."""

import sys

from dask_imgread.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
