#pragma once
#include "attention_forward.h"
#include "attention_grad.h"
