. .sweep/lib.sh
COMMIT=$(cat .sweep/commit)
(LIMIT=170 TL=150 RHO=0.5 bench $PWD 0 8192 p8192 entropy twin,routed --no-repeat-twin; cp $R/profile_p8192.txt $OUT/) &
(LIMIT=170 TL=150 RHO=0.5 bench $PWD 1 2048 p2048 entropy twin,routed --no-repeat-twin; cp $R/profile_p2048.txt $OUT/) &
wait
