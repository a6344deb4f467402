"""From fetched batches to this rank's micro-batches: policy versions, staleness, quarantine, advantages, dealing."""
