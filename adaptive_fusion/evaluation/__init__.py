"""What answers are worth: questions with right answers, metrics of text, likelihoods, and how sure a mean is."""
