"""From a batch to new weights. The learner knows no algorithm: advantages, masks and log-probabilities arrive with it."""
