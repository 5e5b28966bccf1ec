"""The command line `cbn`: parse, call the library, print. Installed as cbn_convert.cli."""
