"""What each pipeline rank computes when: schedules as data, their proof, their cost, their picture. No torch."""
