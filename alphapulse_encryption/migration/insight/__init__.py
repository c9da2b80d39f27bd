"""What a person may want to know: status, plan, drift, slow queries; no change of what is looked at."""
