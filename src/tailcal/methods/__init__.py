"""One file a method; blocks of params.yaml use it by its name. See tailcal.method for the contract."""
