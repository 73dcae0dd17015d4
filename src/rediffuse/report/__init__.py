"""`rediffuse report`: everything that a run left, on one page that needs nothing else."""
