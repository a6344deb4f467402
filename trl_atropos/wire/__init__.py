"""What Atropos sends: the client of its API, the journal that a batch is in before anybody reads it, and the parser."""
