// Nothing to mend yet.
