"""Work behind training: a queue and a thread for each destination, how long may be waited for it, and what failed.

Knows nothing of attention: jobs are functions, and components are named by strings.
"""
