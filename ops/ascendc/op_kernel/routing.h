#pragma once
#include "permute.h"
#include "top_k.h"
