"""What tests of several packages share: files, small models, waiting, processes, and the programs that tests need."""
