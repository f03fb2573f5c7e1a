"""Actors as Ray processes: connect, place, launch, ship files. The only package that imports `ray`."""
