"""The embedded world: small pictures, written in the official formats of the real data sets."""
