// What the parts of the null GPU share. Each is a library of CUDA's; together they are one, for LD_PRELOAD.
#pragma once

#define API extern "C" __attribute__((visibility("default")))

int null_gpu_launch(void *stream);          // count a kernel; 0
int null_gpu_num_devices();                 // 1, or 0 where CUDA_VISIBLE_DEVICES hides it
int null_gpu_attribute(int attribute);      // of the device; runtime and driver number them alike
bool null_gpu_holds(const void *address);   // memory that it gave out?
