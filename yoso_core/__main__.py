"""``python -m yoso_core``: the same as the command ``yoso``."""

from yoso_core.cli import main

if __name__ == "__main__":
    main()
