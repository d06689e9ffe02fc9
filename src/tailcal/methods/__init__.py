"""One file per method; blocks of params.yaml use it by its name. See tailcal.method for the contract."""
