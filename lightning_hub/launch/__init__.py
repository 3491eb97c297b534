"""Who is started where: the place of a process among others, the shape of a run, and the ranks of this machine."""
