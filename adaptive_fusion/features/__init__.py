"""What is measured on an input: of its images or frames, and of what is asked."""
