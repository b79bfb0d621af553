"""The experiments of this repository: data sets, rows and tables. Not part of the package."""
