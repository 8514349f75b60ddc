"""`python -m instructblip` is the command `instructblip`."""

from instructblip.cli.main import main

if __name__ == "__main__":
    main()
