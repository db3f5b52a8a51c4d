// Q2_K, Q3_K, Q4_K, Q5_K and Q6_K with ggml's bytes, plain and with an imatrix.
#include "kquants_asymmetric.hpp"
#include "kquants_symmetric.hpp"

LQ_FAMILY(kquants,
          {"q2_k", 256, 84, quantize_q2_k},
          {"q3_k", 256, 110, quantize_q3_k},
          {"q4_k", 256, 144, quantize_q4_k},
          {"q5_k", 256, 176, quantize_q5_k},
          {"q6_k", 256, 210, quantize_q6_k})
