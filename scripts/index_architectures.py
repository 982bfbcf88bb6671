"""Write fxgrow/architecture_index.json, the sketches by which recognition orders its candidates.

Run it when a new torchvision brings new models: ``python scripts/index_architectures.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

from fxgrow import recognition

if __name__ == "__main__":
    target = Path(recognition.__file__).with_name(recognition.INDEX_FILE)
    target.write_text(json.dumps(recognition.build_index(), indent=0) + "\n", encoding="utf-8")
