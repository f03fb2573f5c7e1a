"""From a batch to new weights. The learner knows no algorithm: advantages and masks arrive with the batch."""
