"""What each pipeline rank computes when: plans as data, their proof, cost and picture, without torch; the executor."""
