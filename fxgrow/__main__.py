"""``python -m fxgrow`` is the command ``fxgrow``."""

from fxgrow.cli import main

if __name__ == "__main__":
    main()
