"""The page of `atomdiff ui`: training jobs, images and a library of concepts, without code."""
