"""Scenes as each owner of a data set would write them; a file here has the name of its reader's
in ``data/sources/``."""
