"""The ground floor: parameter specs, sharding, trees, configs, checksums, files. Knows nothing of models.

Shape letters, the same in every file. An array's name may end in them: `x_BLD`.

    B  rows of a batch              D  width of the model         V  vocabulary
    L  tokens in a row (queries)    H  query heads                N  images in a row
    S  keys                         K  key and value heads        P  patches in a row
    M  media tokens in a row        E  size of a head             C  values in a patch
                                    F  width inside the MLP
"""
