"""`python -m accvideo_core` is the `accvideo` command, for where scripts are not on the path (ComfyUI's portable Python)."""

import sys

from .cli import main

sys.exit(main())
