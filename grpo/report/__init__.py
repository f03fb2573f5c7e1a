"""The report of a run or of several: one HTML page, made from the run's folder and the files in `page/`."""
