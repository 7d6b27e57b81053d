import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))       # `import unet` works wherever pytest is started

# Nothing here may reach for the network, and the output is the tests' own: no progress bars, no advice. The
# libraries read these at import, hence here, before any test module is.
os.environ.update(HF_HUB_OFFLINE='1', TRANSFORMERS_OFFLINE='1', HF_HUB_DISABLE_PROGRESS_BARS='1',
                  TRANSFORMERS_VERBOSITY='error', DIFFUSERS_VERBOSITY='error')
