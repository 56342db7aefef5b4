"""Work in the background of training: a queue and a thread per destination, a wait budget, and failures.

This package knows nothing of attention: jobs are functions, and parts are named by strings.
"""
