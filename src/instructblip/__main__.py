"""`python -m instructblip` is the command `instructblip`."""

from instructblip.cli import main

if __name__ == "__main__":
    main()
