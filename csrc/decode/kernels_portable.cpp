// The arithmetic for any processor.
#include "kernels.h"

#define DECODE_LEVEL portable
#define DECODE_NAME "portable"
#define DECODE_LANES 4
#include "kernels_body.h"
#include "packed_body.h"
