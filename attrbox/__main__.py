"""`python -m attrbox`: the command."""

from attrbox.pipeline.cli import main

if __name__ == "__main__":
    main()
