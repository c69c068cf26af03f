def case(w,s,n): return ''
count=lambda w: 1
