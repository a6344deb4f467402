"""What a run shows of itself while it goes on: lines in a log, a panel on a terminal, numbers for Prometheus."""
