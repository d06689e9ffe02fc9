"""One file a method; the file's name is the method's name in params.yaml. See tailcal.method for the contract."""
