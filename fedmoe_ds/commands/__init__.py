"""Commands: the command lines of `fedmoe` and of launch/: what they take, in words and options, and what they start."""
