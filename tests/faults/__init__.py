"""A world of faults in virtual time: the real controller and the real server against everything that can go wrong."""
